"""vLLM with WhyRec in it: beams on its own model, constrained SIDs, recommendations over HTTP."""
