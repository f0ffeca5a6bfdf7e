"""Where do the sample corpora and sample tasks come from?"""
