"""Train a caption decoder, under a launcher: `accelerate launch train.py flickr8k --data.root DIR`."""

import sys

from captioner.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
