"""Show: tables, pages and pictures of finished runs.

tables   Tables in Markdown; cells are those of a study, closed has the tables of closed ones.
report   One page from finished runs, made by report_page.
patches  Which expert takes which patch of your images.
"""
