"""`python -m ernie_quant`."""

from ernie_quant.cli.main import main  # type: ignore[import-not-found]  # lies in cli/, outside mypy's view

main()
