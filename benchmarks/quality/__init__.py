"""How well FR-Merging, FREE-Merging and their rivals keep eight fine-tuned encoders' accuracy, per stored byte."""
