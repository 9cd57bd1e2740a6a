"""`python -m ernie_quant`."""

from ernie_quant.cli.main import main

main()
