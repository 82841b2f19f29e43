"""Caption a split and score it: `accelerate launch evaluate.py --model DIR --data.root DIR`."""

import sys

from captioner.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
