"""vLLM's data parallelism: several engines behind one API server, each with the whole model.

    whyrec serve MODEL --data-parallel-size 2

`EngineClient.collective_rpc` goes to the workers of all of them and returns what the first replied:
right for what all must know, such as a new catalogue. A beam is for one of them, which vLLM's own
client can be asked for by name; that name is not part of its documented interface.
"""

from typing import Any

from vllm.engine.protocol import EngineClient


def count_replicas(client: EngineClient) -> int:
    """How many engines this API server has.

    Raises:
        ValueError: when there are several and this vLLM cannot speak to one of them.
    """
    core = getattr(client, "engine_core", None)
    count = len(getattr(core, "core_engines", [None]))
    if count > 1 and not hasattr(core, "_call_utility_async"):
        raise ValueError(
            "this vLLM has no way to ask one of its replicas; leave --data-parallel-size out, and "
            "start several servers behind a load balancer"
        )
    return count


async def ask_replica(
    client: EngineClient, replica: int, method: str, arguments: tuple[Any, ...]
) -> Any:
    """An RPC to the workers of one replica; what its first worker replies."""
    if count_replicas(client) == 1:
        return (await client.collective_rpc(method, args=arguments))[0]
    core: Any = client.engine_core  # type: ignore[attr-defined]
    call = ("collective_rpc", method, None, arguments, None)
    return (await core._call_utility_async(*call, engine=core.core_engines[replica]))[0]
