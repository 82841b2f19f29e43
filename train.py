"""Train a caption decoder: `accelerate launch train.py RECIPE --data.root DIR`."""

import sys

from captioner.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
