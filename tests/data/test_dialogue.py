"""A dialogue: its joined text, the places of its turns, who spoke, and what is answered."""

from dataclasses import replace

import numpy as np

from empcause.data import LISTENER, SPEAKER, Causes, Dialogue, live_dialogue, response_pairs


def test_joined_turns():
    dialogue = Dialogue(("Hello there.", "Hi!"), (SPEAKER, LISTENER))
    assert dialogue.text == "Hello there. Hi!"
    assert [dialogue.text[start:end] for start, end in dialogue.turn_spans] == ["Hello there.", "Hi!"]


def test_the_last_turn_of_a_live_dialogue_is_the_speakers():
    assert live_dialogue(["a"]).roles == (SPEAKER,)
    assert live_dialogue(["a", "b"]).roles == (LISTENER, SPEAKER)
    assert live_dialogue(["a", "b", "c"]).roles == (SPEAKER, LISTENER, SPEAKER)


def test_a_pair_keeps_what_is_known_of_its_dialogue():
    dialogue = Dialogue(("a", "b", "c", "d"), (0, 1, 0, 1), conv_id="x", emotion="sad", situation="s")
    assert response_pairs([dialogue]) == [
        replace(dialogue, turns=("a",), roles=(0,), response="b"),
        replace(dialogue, turns=("a", "b", "c"), roles=(0, 1, 0), response="d"),
    ]
    assert response_pairs([Dialogue(("b", "a"), (1, 0))]) == [], "a turn that opens the dialogue answers nothing"


def test_the_text_is_that_of_the_turns_after_a_change():
    dialogue = Dialogue(("a", "b"), (0, 1))
    assert dialogue.text == "a b"
    shorter = replace(dialogue, turns=("b",), roles=(1,), causes=Causes(np.zeros((0, 2)), np.zeros(0)))
    assert (shorter.text, shorter.turn_spans) == ("b", ((0, 1),))
