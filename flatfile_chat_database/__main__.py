"""`python -m flatfile_chat_database` is `chatdb`."""

from .cli import main

if __name__ == "__main__":
    main()
