"""Private attributes of torch's optimizers and schedulers."""

from __future__ import annotations

#: Attributes in which an optimizer keeps hooks on its state dict.
STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

#: Entries of schedulers' states: learning rates of the parameter groups, the count of steps, the schedulers that one is
#: made of, and the steps at which these take turns.
LAST_RATES = "_last_lr"
STEP_COUNT = "_step_count"
INNER_SCHEDULERS = "_schedulers"
MILESTONES = "_milestones"

#: Class of an optimizer -> entries of a parameter's state that its step sets before it reads them: replicas may differ
#: in them, as ranks' losses do. Source: ``torch.optim.LBFGS.step``.
UNREAD_STATE = {"LBFGS": ("prev_loss",)}


def inner_schedulers(scheduler: object) -> object:
    """The schedulers that a scheduler is made of; ``None`` where it is made of none."""
    return getattr(scheduler, INNER_SCHEDULERS, None)
