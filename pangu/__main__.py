from pangu.cli import main

raise SystemExit(main())
