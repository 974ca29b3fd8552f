"""An analysis as one HTML page: charts.py draws, tables.py and heat.py list, page.py puts them together."""
