"""The tokenizer of the embedded tasks: every number 0..99 is one token, every sign another; nothing is downloaded.

"3,5,7>22" and a newline read 3 , 5 , 7 > 22 newline. Decoding joins the tokens, so it loses nothing. Characters that
the tasks do not use become <unk>.
"""

from __future__ import annotations

from typing import Any

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SIGNS = ("\n", "+", "-", "*", "/", "=", ",", ">")
# A greedy number of two digits without leading zero: "105" reads 10 5, "007" reads 0 0 7.
PIECES = r"0|[1-9][0-9]?|[\s\S]"


def vocabulary() -> dict[str, int]:
    """Token -> id. Example: {"<pad>": 0, "<eos>": 1, ..., "99": 110}"""
    tokens = [PAD, EOS, UNKNOWN, *SIGNS, *map(str, range(100))]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast`; `save_pretrained` writes it beside a model, `AutoTokenizer` reads it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
