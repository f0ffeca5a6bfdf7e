from data.overlap import RUN, Runs

WORDS = [f"word{number}" for number in range(40)]


def test_a_text_is_found_wherever_a_long_run_of_it_stands() -> None:
    text = " ".join(WORDS[:20])
    assert Runs([text]).found_in(f"before {text.upper()}  after") == {0}
    assert Runs([text]).found_in(text[7 : 7 + RUN + 8]) == {0}


def test_shared_words_alone_are_no_overlap() -> None:
    text = " ".join(WORDS[:20])
    assert Runs([text]).found_in(" ".join(reversed(WORDS))) == set()


def test_a_short_text_counts_as_a_whole() -> None:
    assert Runs(["床前明月光", "没有这首诗"]).found_in("李白：床前明月光，疑是地上霜。") == {0}
