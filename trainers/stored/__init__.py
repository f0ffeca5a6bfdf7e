"""What do the files of a run's folder hold, read back by whom?"""
