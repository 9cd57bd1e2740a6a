"""Plug-ins for programs that have no loader of their own for what this tool writes.

`register` stands in pyproject.toml as an entry point of vLLM's group `vllm.general_plugins`: vLLM calls it in every process, of
whatever model (vllm-project/vllm, plugins/__init__.py). With it vLLM serves WINT2 experts as they are stored
(runtimes/_wint2.py): `vllm_door` is opened by it, `vllm_config` finds the layers, `vllm_method` loads them, `experts` and
`experts_triton` compute. transformers has no such group: people import `ernie_quant.transformers`, which puts the quantizers of
`transformers_quantizer` into its tables.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make quant_method "ernie-wint2" known to vLLM; nothing the second time. Never raises: most models are not ours."""
    try:
        from ernie_quant.serving import vllm_door

        vllm_door.open_once()
    except Exception as error:  # of a vLLM that is unlike all that are known
        logging.getLogger(__name__).warning("ernie-quant: vLLM will not know quant_method ernie-wint2 (%r)", error)
