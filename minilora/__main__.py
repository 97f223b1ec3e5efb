"""`python -m minilora` is the command `minilora`."""

from minilora.cli import main

main()
