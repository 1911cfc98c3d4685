"""What the card of a training run says in words."""

import dataclasses

from moe_bench.report.health_view import MAX_ALARMS
from moe_bench.report.html.training_card import training_card
from tests.report.pages import training_run


def test_the_card_says_what_runs_how_far_it_is_and_what_is_wrong() -> None:
    card = training_card(0, training_run())
    facts = {fact.label: fact.text for fact in card.facts}
    assert "smoke scale; modified: steps.seed=7" in card.title
    assert (facts["run"], facts["layout"], facts["steps"]) == ("runs/first", "EP2 DP2", "12 of 12")
    assert facts["system"] == "2 processes on a machine without GPUs"
    assert facts["validation"] == "2.8333 nats per token, perplexity 17.00, after step 12"
    assert card.alarms_text == "1 alarm about experts."
    assert card.alarms is not None
    assert card.alarms.rows == (("8", "decoder.2", "3", "got no token in 4 steps (alarm from 4)"),)
    assert card.substitutions


def test_a_run_that_has_not_begun_and_one_without_alarms_say_so() -> None:
    run = training_run()
    fresh = training_card(0, dataclasses.replace(run, log=(), health=()))
    assert {"steps": "0 of 12"}.items() <= {fact.label: fact.text for fact in fresh.facts}.items()
    assert fresh.alarms_text.startswith("Tokens per expert were not counted yet")
    calm = training_card(0, dataclasses.replace(run, health=run.health[:2]))
    assert (calm.alarms, calm.alarms_text) == (None, "No alarms about experts up to step 4.")


def test_of_many_alarms_the_last_are_shown_and_the_others_counted() -> None:
    run = training_run()
    (alarm,) = run.health[3].alarms
    loud = run.health[3].model_copy(
        update={
            "alarms": tuple(alarm.model_copy(update={"expert": index}) for index in range(MAX_ALARMS + 2))
        }
    )
    card = training_card(0, dataclasses.replace(run, health=(loud,)))
    assert card.alarms is not None
    assert [row[2] for row in card.alarms.rows] == [str(index) for index in range(2, MAX_ALARMS + 2)]
    assert card.alarms_text == "22 alarms about experts; 2 earlier ones are in health.jsonl alone."
