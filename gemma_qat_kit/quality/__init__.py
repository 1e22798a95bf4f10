"""What a number format costs: texts, scores token by token, comparisons of models and of formats."""
