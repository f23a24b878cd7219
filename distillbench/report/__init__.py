"""The report: a static folder of pages, figures and tables made from records. A view of records, nothing else; no torch here."""
