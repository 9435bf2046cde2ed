"""`python -m cvlab` is the same program as `cvlab`."""

from cvlab.cli.main import main

if __name__ == "__main__":
    main()
