"""Results for people: tables in several forms, a page to browse, pictures."""
