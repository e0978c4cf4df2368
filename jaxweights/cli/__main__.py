"""`python -m jaxweights.cli`, where the command `jaxweights` is not installed."""

from jaxweights.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
