"""`import ernie_quant.transformers`: Hugging Face transformers then loads what it would not load, or load wrongly, by itself.

That is WINT2 experts, experts of different forms in different layers, and quantized VL models; docs/formats.md has a table. Call
`from_pretrained` as ever after it. What is quantized is decoded when it is loaded; `Wint2Config(native=True)` keeps experts in
memory as they are stored. Raises NeedsError where transformers is missing or of a version that nobody tried.
"""

from __future__ import annotations

from ernie_quant.serving import transformers_versions

transformers_versions.check()

from ernie_quant.serving.transformers_quantizer import Wint2Config as Wint2Config  # noqa: E402
from ernie_quant.serving.transformers_registry import register  # noqa: E402

register()
