"""`python -m internlm2` is the command line."""

from internlm2.cli.main import main

if __name__ == "__main__":
    main()
