"""Study: which runs are compared, and what they say together.

sweep    Runs a study: studies (lists of variants), starts, curves, routers, regime_map,
         molecules, unseen.
pages    Puts the tables of all studies into the docs.
advise   Asks your own data what they want (questions, by models of probes, on what views
         tell of a node), and compares dense models with experts until the answer is clear.
planted  Makes data for studies; ensemble scores runs together.
"""
