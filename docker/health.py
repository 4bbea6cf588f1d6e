"""Health of a container: every GPU it was given answers. Exit status 1 and one line: one does not.

Asks the driver alone, without a context on the GPU; a container without a GPU is healthy. That a run makes progress is
its own to watch (`run.timeout`).
"""

import sys
from pathlib import Path

import pynvml

DEVICES = Path("/dev")


def main() -> int:
    """Asks each GPU for its memory."""
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return 0
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
    except pynvml.NVMLError as error:
        sys.stderr.write(f"error: a GPU does not answer: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
