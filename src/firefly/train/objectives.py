"""What is learned: which tokens of a sample carry the loss.

`sft` learns the answers, as the chat format marked them; `pretrain` learns every token that has a predecessor.
Method, objective and parallelism are three independent choices of one loop; a new objective is one row here.
"""

from __future__ import annotations

from firefly.recipe import Kind

LEARNS_EVERY_TOKEN: dict[Kind, bool] = {"sft": False, "pretrain": True}
