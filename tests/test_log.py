"""Errors under the names of the command that was given."""

from __future__ import annotations

import pytest

from lora_dist.log import GuardError, UserError


@pytest.mark.parametrize("kind", [UserError, GuardError])
@pytest.mark.parametrize(
    "names,line,renamed",
    [
        ({"adapter.r": "lora_r"}, "adapter.r: found 0, adapter.rank too", "lora_r: found 0, adapter.rank too"),
        ({"data.packing": "packing"}, "set data.packing, data.packing_length", "set packing, data.packing_length"),
        ({"data.": ""}, "data.split: found none (data.dataset_name)", "split: found none (dataset_name)"),
        ({"data.": ""}, "MODEL: out/data.bin and mydata.x", "MODEL: out/data.bin and mydata.x"),
        ({"data.prompt_template": r"a\1"}, "data.prompt_template: gone", r"a\1: gone"),
    ],
)
def test_options_are_renamed_as_a_whole(kind, names, line, renamed):
    error = kind([line, "another line"]).renamed(names)
    assert type(error) is kind and error.problems == [renamed, "another line"]
