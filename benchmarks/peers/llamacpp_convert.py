"""A checkpoint folder as a GGUF file by llama.cpp's own converter: ``llamacpp_convert.py LLAMA_CPP FOLDER OUT``.

LLAMA_CPP is a checkout. The converter knows a tokenizer by a hash of what it makes of a text; here all are taken for
GPT-2's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    checkout, folder, out = sys.argv[1:4]
    sys.path[:0] = [checkout, str(Path(checkout) / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    first = base.ModelBase.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        first(self, *arguments, **options)
        type(self).set_vocab = lambda self: self._set_vocab_gpt2()
        type(self).get_vocab_base_pre = lambda self, tokenizer: "gpt-2"

    base.ModelBase.__init__ = init
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(str(Path(checkout) / "convert_hf_to_gguf.py"), run_name="__main__")


main()
