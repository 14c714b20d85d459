"""`python -m occgen_hub`, which is `occgen-hub`."""

from occgen_hub.cli import main

if __name__ == "__main__":
    main()
