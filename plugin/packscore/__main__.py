"""`python -m packscore` is the command line."""

from packscore.cli.app import main

if __name__ == "__main__":
    main()
