"""What a failure is called in front of people: one sentence that says what to do."""

import errno


def sentence(error: Exception) -> str | None:
    """What went wrong, on one line; None for a fault of ours, which needs its traceback."""
    text = " ".join(str(error).split())
    if _is_full_disk(error, text):
        where = getattr(error, "filename", None)
        return (
            f"no room is left on the disk{f' to write {where}' if where else ''}; free some and "
            "run the same command again, all that was finished before is as it was"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file or folder {error.filename}; check the path"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} may not be read or written; change its permissions"
    return text if isinstance(error, ValueError | OSError) else None


def _is_full_disk(error: Exception, text: str) -> bool:
    """Rust and C++ writers (safetensors, tokenizers, torch.save) say it in words of their own."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if getattr(error, "errno", None) in numbers:
        return True
    if any(f"(os error {number})" in text for number in numbers):
        return True
    return (
        isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text
    )
