"""What runs did, as one page that needs no network: facts from their folders, charts of them, HTML."""
