"""Make an encoder: `accelerate launch pretrain.py RECIPE --images DIR`."""

import sys

from captioner.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
