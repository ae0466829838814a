"""How hypothesis draws operands of interpreted kernels."""

from hypothesis import HealthCheck, Phase, settings


def few(examples: int) -> settings:
    """So many drawn cases, the same every time; not shrunk, for which the interpreters would need minutes."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
