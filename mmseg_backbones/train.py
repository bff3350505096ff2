"""``python -m mmseg_backbones.train CONFIG ...``: MMSegmentation's own tools/train.py, wherever it is installed."""

from mmseg_backbones._tools import run_tool

__all__: list[str] = []

if __name__ == "__main__":
    run_tool("train.py", trains=True)
