"""The data sets, and what training needs of one (:mod:`experiments.train.data.task`)."""
