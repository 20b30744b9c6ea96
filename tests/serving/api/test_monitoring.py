"""Numbers as Prometheus' own parser reads them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from axolotl_ivon.serving.api.monitoring import Metrics


def test_prometheus_reads_them() -> None:
    watched = {"waiting": 2.0}
    metrics = Metrics(lambda: watched)
    other = Metrics(dict)  # each server has its own
    metrics.request("/v1/models", 200, 0.5)
    metrics.tokens(3, 4)
    metrics.first_token(0.1)
    metrics.answer({"confidence": 0.95, "mutual_information": 0.02, "abstain": True})
    metrics.answer({"confidence": None, "mutual_information": None})
    watched["waiting"] = 5.0
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert found["ivon_waiting",] == 5
    assert found["ivon_requests_total", "/v1/models", "200"] == 1
    assert found["ivon_tokens_total", "generated"] == 4
    assert found["ivon_tokens_total", "prompt"] == 3
    for name in ("ivon_confidence_count", "ivon_abstained_total", "ivon_first_token_seconds_count"):
        assert found[name,] == 1
    assert found["ivon_confidence_sum",] == pytest.approx(0.95)
    assert found["ivon_mutual_information_bucket", "0.03"] == 1
    assert found["ivon_mutual_information_bucket", "0.01"] == 0
    assert b"/v1/models" not in other.text()
