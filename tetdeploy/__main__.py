"""`python -m tetdeploy`."""

from tetdeploy.cli import main

if __name__ == "__main__":
    main(prog_name="tetdeploy")
