"""What a policy allows: as much of IAM as the program's own policies use.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

Statement = Mapping[str, Any]
# Of a request: the values of each condition key that it has.
Context = Mapping[str, Sequence[str]]


def allows(statements: Iterable[Statement], action: str, resource: str, context: Context) -> bool:
    """Whether any statement allows an action on a resource (its ARN) in a request.

    Raises NotImplementedError for what is not known here, as to pass over it might allow too much.
    """
    return any(_allows(statement, action, resource, context) for statement in statements)


def _allows(statement: Statement, action: str, resource: str, context: Context) -> bool:
    if statement.keys() - {"Effect", "Action", "Resource", "Condition"}:
        raise NotImplementedError(f"a statement with {sorted(statement)}")
    if statement["Effect"] != "Allow":
        raise NotImplementedError(f"the effect {statement['Effect']}")
    return (
        any(fnmatchcase(action, known) for known in _list(statement["Action"]))
        and any(fnmatchcase(resource, known) for known in _list(statement["Resource"]))
        and all(
            _holds(operator, _list(wanted), context.get(key))
            for operator, tests in statement.get("Condition", {}).items()
            for key, wanted in tests.items()
        )
    )


def _holds(operator: str, wanted: Sequence[str], values: Sequence[str] | None) -> bool:
    if operator == "Null":
        return (values is None) == (wanted == ["true"])
    if operator == "StringEquals":
        return values is not None and any(value in wanted for value in values)
    if operator == "ForAllValues:StringEquals":
        return all(value in wanted for value in values or ())
    raise NotImplementedError(f"the condition {operator}")


def _list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value
