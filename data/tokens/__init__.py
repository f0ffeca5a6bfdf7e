"""How does text become token ids, and what do ids stand for? Tokenizer, vocabulary, words, sentences, n-grams."""
