"""`python -m jaxattr` is the command `jaxattr`."""

from jaxattr.command.main import main

if __name__ == "__main__":
    main(prog_name="jaxattr")
