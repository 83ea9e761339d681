"""`align` under FSDP2 on the CPU: `torchrun … fsdp_on_cpu.py RUN RECIPE_JSON`, for test_align.py.

Accelerate shards on accelerators only, so these gloo processes tell it that they are some. Blocks
are fused as they are there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from fused_on_cpu import fuse_in_training

from whyrec.train.align import align
from whyrec.train.align_recipe import AlignRecipe

torch.set_num_threads(1)
_init = PartialState.__init__


def _as_if_on_gpus(self: Any, *arguments: Any, **settings: Any) -> None:
    _init(self, *arguments, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _as_if_on_gpus
    fuse_in_training()
    align(Path(sys.argv[1]), AlignRecipe(**json.loads(sys.argv[2])))
