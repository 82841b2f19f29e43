"""`python -m captioner`, also under a launcher: `accelerate launch -m captioner train ...`."""

from captioner.cli import main

if __name__ == "__main__":
    main()
