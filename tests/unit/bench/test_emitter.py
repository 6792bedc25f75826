"""What a simulated engine costs by itself."""

from bench.emitter import measure
from tests.unit.simulated_config import CONFIG


def test_the_cost_of_a_token_is_measured_over_whole_answers() -> None:
    cost_s = measure(CONFIG, [[1, 2, 3], [4, 5, 6]], output_tokens=20)
    assert 0 < cost_s < 0.01
