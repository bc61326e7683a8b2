"""One device against many: is the parallel run right, and if not, which module differs first?"""
