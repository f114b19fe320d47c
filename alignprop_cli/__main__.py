"""Run the command line with `python -m alignprop_cli`."""

from alignprop_cli.cli import main

if __name__ == "__main__":
    main()
