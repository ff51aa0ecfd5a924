"""The stacks of one sandbox: a state and outputs for each, in one world with one cloud.

As with Pulumi, a stack may read the outputs of another, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox.plan import Plan, checked_name
from sandbox.state import State
from settings import NAMESPACE

# The stack of Pulumi.sandbox.yaml, which is often the only one.
MAIN = "sandbox"


def folder(plan: Plan, stack: str) -> Path:
    """Where a stack's state and outputs lie."""
    return plan.state_dir if stack == MAIN else plan.state_dir / "stacks" / checked_name(stack)


def load(plan: Plan, stack: str) -> State:
    """A stack's state; an empty one if there is none yet."""
    return State.load(folder(plan, stack) / "state.json")


def hashes(plan: Plan, stack: str) -> dict[str, str]:
    """What bcrypt made of a stack's passwords. Nothing is written where there is no state yet."""
    return dict(load(plan, stack).hashes.value) if stack in every(plan) else {}


def every(plan: Plan) -> dict[str, State]:
    """The states of all stacks that were ever brought up, by name."""
    others = sorted(path.parent.name for path in (plan.state_dir / "stacks").glob("*/state.json"))
    main = [MAIN] if (plan.state_dir / "state.json").exists() else []
    return {stack: load(plan, stack) for stack in [*main, *others]}


def outputs(plan: Plan, name: str) -> Mapping[str, Any]:
    """The outputs of the stack that a StackReference calls so; none if it was never brought up.

    https://www.pulumi.com/docs/iac/concepts/state-and-backends/#using-a-self-managed-backend
    """
    state = every(plan).get(name.removeprefix(f"organization/{NAMESPACE}/"))
    return state.outputs if state else {}
