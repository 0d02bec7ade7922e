"""`anyflow bench`: does this GPU compute what it should, and how long does a step take?"""
