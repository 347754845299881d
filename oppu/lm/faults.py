"""Recognise errors of a model's library that no retry in this process can mend.

By name and text, since only the library's wrapper may import it: whoever asks the model catches whatever it raises.
"""

from oppu.errors import ModelLost

_DEVICE_ERROR = "CUDA error"
"""How the text of a device's fault begins, whatever its type: an illegal access, an assertion, a failed launch. The
device's context is gone with it, and everything asked of it afterwards fails in the same way."""

_REFUSED = "CUBLAS_STATUS_"
"""In the text of a product that the library refused: the device is as it was."""
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: Exception) -> bool:
    """Say whether memory is exhausted, the device's or the machine's."""
    named = isinstance(error, MemoryError) or _named(error, "OutOfMemoryError")
    return named or any(text in str(error) for text in _OUT_OF_MEMORY)


def device_fault(error: Exception) -> ModelLost | None:
    """Return what is to be raised from an error that has ended the device's context; ``None`` for any other."""
    said = isinstance(error, RuntimeError) and str(error).startswith(_DEVICE_ERROR)
    if out_of_memory(error) or _REFUSED in str(error) or not (said or _named(error, "AcceleratorError")):
        return None
    return ModelLost(f"the device is lost: {(str(error).splitlines() or [''])[0] or type(error).__name__}")


def _named(error: Exception, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(error).__mro__)
